"""Policies over HTTP: routes, episodes, who gets in, what happens on a fault. Knows no model."""
