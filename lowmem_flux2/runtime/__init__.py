"""Carries a plan out with torch. Makes no policy: where weights rest and in which order comes from the plan."""
