"""How long a planned run takes and what it costs: estimates by a roofline. Pure."""
