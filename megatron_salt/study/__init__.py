"""A study: does SALT pay on this model and this data? Arms x seeds of ordinary runs, what they cost, and what their curves show."""
