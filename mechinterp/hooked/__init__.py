"""The hooked-model layer: sites, cache, interventions, and the one forward."""
