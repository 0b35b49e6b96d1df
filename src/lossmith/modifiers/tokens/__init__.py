"""Modifiers of a loss that is summed over tokens."""
