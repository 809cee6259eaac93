"""What a patch store holds, for others: STAC, a data card, a page to look at."""
