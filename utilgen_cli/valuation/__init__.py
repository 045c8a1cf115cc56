"""How useful a sample is: the bi-level value model, its scores, baselines, sets and pairs."""
