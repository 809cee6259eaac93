"""The training loop and what feeds it; knows no Ray and no MLflow."""
