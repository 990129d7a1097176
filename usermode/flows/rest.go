package flows

import "time"

const (
	// How long the socket of a flow that made room for others is kept, and how many are: the longest that most programs wait for an answer
	// that they ask for again.
	restTime   = 5 * time.Second
	maxResting = 1024
)

// resting is a flow that made room for others. As long as its socket is open nobody else is given its port: the host would deliver an
// answer that is late to whichever flow to the same destination has it, and that may be another guest's. So
// it comes to whom it is for. A flow that has expired needs no rest: nobody waits for an answer for so long.
type resting struct {
	*udpFlow
	until time.Duration
}

// restLocked has a flow that was removed rest. It returns one to close for it, if there are too many.
func (t *udpTable) restLocked(f *udpFlow) (over []*udpFlow) {
	t.resting = append(t.resting, resting{f, t.now() + restTime})
	if len(t.resting) > maxResting {
		return t.wakeLocked(1)
	}
	return nil
}

// wakeLocked returns the n that have rested for longest, for the caller to close.
func (t *udpTable) wakeLocked(n int) (over []*udpFlow) {
	for _, r := range t.resting[:n] {
		over = append(over, r.udpFlow)
	}
	clear(t.resting[:n])
	t.resting = t.resting[n:]
	return over
}

// restedLocked returns those that have rested for long enough, for the caller to close.
func (t *udpTable) restedLocked(now time.Duration) []*udpFlow {
	n := 0
	for n < len(t.resting) && t.resting[n].until <= now {
		n++
	}
	return t.wakeLocked(n)
}
