"""Tasks for lm-eval that come with the library: nothing is fetched for them."""
