"""The cascade: loading, adapters, sampling, results and memory."""
