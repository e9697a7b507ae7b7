"""The cascade that draws: loading, adapters, sampling, results, memory."""
