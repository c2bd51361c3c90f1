"""What the commands run: memorise, unlearn, measure, report."""
