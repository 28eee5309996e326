"""Rewards on CLIP: CLIPScore, CLIP image similarity, HPS-v2.1, PickScore and the aesthetic predictor."""
