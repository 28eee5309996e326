"""Rewards on CLIP: CLIPScore, HPS-v2.1, PickScore and the aesthetic predictor."""
