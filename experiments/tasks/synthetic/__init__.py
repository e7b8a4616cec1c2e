"""Tasks made from seeds alone: tokens in, a label at every position where there is something to predict."""
