package engine

import (
	"errors"
	"testing"
	"time"
)

// Wait asks until it is told that all is well; after the time the test fails with the last error.
func Wait(t testing.TB, limit time.Duration, what string, check func() error) {
	t.Helper()
	deadline := time.Now().Add(limit)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Errorf("waited %v for %s: %v", limit, what, err)
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// Same tells what a host has or lacks that it did not when s was taken; nil: nothing.
func (s Snapshot) Same(after Snapshot) error {
	if diff := s.Diff(after); diff != "" {
		return errors.New(diff)
	}
	return nil
}
