"""Engines that generate text."""
