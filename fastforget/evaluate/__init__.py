"""What a model still knows: leakage, utility, and the report."""
