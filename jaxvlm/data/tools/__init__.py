"""What `jaxvlm data` does with a data set: check it, convert it, show it and count it."""
