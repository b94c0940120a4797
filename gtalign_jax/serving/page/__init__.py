"""The server's page: ask, edit the matrix or its price, and see both answers."""
