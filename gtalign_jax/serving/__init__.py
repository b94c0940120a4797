"""A trained model put to use: steering by an edited matrix, sweeps of prices, examples, the server."""
