"""`report.html` of a run: what is read of its files, curves and clouds, figures, samples, the page."""
