"""One process or many, and a model spread over them."""
