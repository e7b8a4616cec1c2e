"""Tasks generated from seeds alone, with tokens as inputs and labels at the positions to predict."""
