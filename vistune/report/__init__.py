"""What a run did, read from its folder alone, on one page; or several runs side by side. No model is opened."""
