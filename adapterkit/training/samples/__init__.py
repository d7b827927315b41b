"""Samples: what they are made from, how they are drawn while training and afterwards, and how they are shown."""
