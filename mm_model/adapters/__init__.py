"""The seams to Ray, MLflow and the local services; nothing else imports them."""
