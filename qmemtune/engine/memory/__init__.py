"""How much memory a run takes, found out from shapes alone."""
