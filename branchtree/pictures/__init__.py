"""Picture and video files of samples and trees."""
