package undo

import (
	"errors"
	"slices"
	"testing"
)

func TestCloseKeepsWhatFailed(t *testing.T) {
	var l List
	var ran []int
	broken := true
	l.Push(func() error { ran = append(ran, 1); return nil })
	l.Push(func() error {
		ran = append(ran, 2)
		if broken {
			return errors.New("busy")
		}
		return nil
	})
	l.Push(func() error { ran = append(ran, 3); return nil })
	if err := l.Close(); err == nil || err.Error() != "busy" {
		t.Fatalf("first Close: %v, want busy", err)
	}
	if want := []int{3, 2, 1}; !slices.Equal(ran, want) {
		t.Fatalf("ran %v, want %v", ran, want)
	}
	broken, ran = false, nil
	if err := l.Close(); err != nil {
		t.Fatalf("second Close: %v", err)
	}
	if want := []int{2}; !slices.Equal(ran, want) {
		t.Fatalf("second Close ran %v, want only the step that had failed", ran)
	}
}
