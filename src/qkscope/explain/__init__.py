"""What a decomposition's features are and do: examples, traces, heads, interventions."""
