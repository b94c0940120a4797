"""A trained model put to use: steering by an edited matrix, steered examples."""
