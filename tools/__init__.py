"""Commands, each with a main: python -m tools.eval, export, sensitivity, bench. What two of them share lies beside
them."""
