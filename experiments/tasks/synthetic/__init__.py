"""Tasks generated from seeds, with tokens as inputs and labels at the positions to predict."""
