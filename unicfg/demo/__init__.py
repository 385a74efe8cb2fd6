"""The page of ``unicfg demo``: one prompt, every family side by side, drawn again as the scale moves."""
