"""What a decomposition's features do: traces, studies, heads, interventions."""
