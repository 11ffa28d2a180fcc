"""Finding retrieval heads: probe, scores, ALiBi scope, selection, stability, heat map."""
