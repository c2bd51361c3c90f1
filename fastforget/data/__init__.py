"""Sources of text, and the collator."""
