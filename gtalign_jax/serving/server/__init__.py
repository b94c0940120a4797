"""One model behind the OpenAI protocol: requests in, a scheduler of rows or another server, answers out."""
