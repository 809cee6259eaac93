"""From a request to images: the generator, and the HTTP application around it."""
