"""The report of a study: a page for a browser, Markdown for a pull request, CSV for other programs, and pictures."""
