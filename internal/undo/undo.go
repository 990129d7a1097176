// Package undo keeps the list of steps that take back what was done. It serves rollback and teardown alike: the
// same list runs when a later step fails and when the thing is no longer wanted.
package undo

import "errors"

// List is a stack of steps. The zero value is ready for use. It is not safe for concurrent use.
type List struct {
	steps []func() error
}

// Push adds a step that takes back what was just done. A step must treat "already gone" as done.
func (l *List) Push(step func() error) { l.steps = append(l.steps, step) }

// Close runs the steps, last first, and returns their errors joined. A step that fails stays on the list, so that
// a repeated Close can finish; the steps below it still run.
func (l *List) Close() error {
	var errs []error
	var kept []func() error
	for i := len(l.steps) - 1; i >= 0; i-- {
		if err := l.steps[i](); err != nil {
			errs = append(errs, err)
			kept = append(kept, l.steps[i])
		}
	}
	l.steps = l.steps[:0]
	for i := len(kept) - 1; i >= 0; i-- {
		l.steps = append(l.steps, kept[i])
	}
	return errors.Join(errs...)
}

// Forget empties the list without running it: what was done now belongs to somebody else.
func (l *List) Forget() { l.steps = nil }
