"""Programs that call one hot function a million times, each in a process of its own."""
