"""A server with OpenAI's interface, for a model that sees an image in few tokens."""
