"""fastforget: make causal language models forget chosen text, fast and in little memory."""

from fastforget.head import LMHead
from fastforget.stats import TokenStats, divergence, token_stats, token_stats_from_logits
