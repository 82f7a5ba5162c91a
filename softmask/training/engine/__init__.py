"""DeepSpeed at every ZeRO stage: start-up, loss scale, partitioning."""
