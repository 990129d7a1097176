package publish

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/vsock/proxy"
)

// link is a session with the host, seen from the guest.
type link struct {
	lines  *lines
	secret string
	checks chan struct{} // asks for ports that are not had to be tried; one may wait

	mu      sync.Mutex
	ended   bool
	last    uint64                  // question
	answers map[uint64]chan message // each has room for one, and is closed when none will come
}

// session makes one session and keeps it until it ends. stood tells whether there was one.
func (c *Client) session(ctx context.Context) (stood bool, err error) {
	l, err := c.connect(ctx)
	if err != nil {
		c.set(nil, err)
		return false, err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer context.AfterFunc(ctx, func() { l.lines.conn.Close() })()
	var parts sync.WaitGroup
	parts.Go(func() { l.lines.ping(ctx) })
	for range c.cfg.Streams {
		parts.Go(func() { c.standBy(ctx, l) })
	}
	c.cfg.Log.Info("the host gateway opens our ports", "gateway", c.cfg.Name)
	c.set(l, nil)
	// After that: what comes too late for its first round finds the session.
	parts.Go(func() { c.keep(ctx, l) })
	err = l.read()
	cancel()
	c.set(nil, err)
	l.end()
	parts.Wait()
	for _, w := range c.all() {
		w.lost(l)
	}
	return true, err
}

// connect asks the host for a session.
func (c *Client) connect(ctx context.Context) (*link, error) {
	ctx, cancel := context.WithTimeout(ctx, dialWithin)
	defer cancel()
	conn, err := c.cfg.Dial(ctx)
	if err != nil {
		return nil, err
	}
	h, err := upgrade(ctx, conn, SessionPath, guestHeader, c.number)
	if err != nil {
		return nil, err
	}
	l := &link{lines: newLines(conn, conn), secret: h.Get(secretHeader), checks: make(chan struct{}, 1), answers: make(map[uint64]chan message)}
	if !isNumber(l.secret) {
		conn.Close()
		return nil, errors.New("answer: it has no secret")
	}
	return l, nil
}

// read takes the host's answers until the session ends, and returns why it did.
func (l *link) read() error {
	for {
		m, err := l.lines.read()
		switch {
		case errors.Is(err, io.EOF), errors.Is(err, net.ErrClosed):
			return ErrClosed
		case errors.Is(err, os.ErrDeadlineExceeded):
			return fmt.Errorf("nothing was heard of it for %s", silence)
		case err != nil:
			return err
		}
		if m.ID == 0 {
			continue
		}
		l.mu.Lock()
		if answer := l.answers[m.ID]; answer != nil {
			delete(l.answers, m.ID)
			answer <- m
		}
		l.mu.Unlock()
	}
}

// end tells all who wait for answers that there will be none.
func (l *link) end() {
	l.lines.conn.Close()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ended = true
	for _, answer := range l.answers {
		close(answer)
	}
	clear(l.answers)
}

// ask puts a question to the host and waits for the answer. The error is the host's own, or wraps ErrClosed.
func (l *link) ask(q message) (message, error) {
	answer := make(chan message, 1)
	l.mu.Lock()
	if l.ended {
		l.mu.Unlock()
		return message{}, ErrClosed
	}
	l.last++
	q.ID = l.last
	l.answers[q.ID] = answer
	l.mu.Unlock()
	if err := l.lines.write(q); err != nil {
		l.lines.conn.Close()
	}
	late := time.AfterFunc(answerWithin, func() { l.lines.conn.Close() })
	defer late.Stop()
	a, ok := <-answer
	switch {
	case !ok:
		return message{}, ErrClosed
	case a.Error != "":
		return message{}, &refusal{a.Error, a.Taken}
	case q.Op == opPublish && a.Port == 0:
		return message{}, &refusal{"the host's answer names no port", false}
	}
	return a, nil
}

// refusal is the host's reason.
type refusal struct {
	reason string
	taken  bool
}

func (e *refusal) Error() string { return e.reason }

func (e *refusal) Is(target error) bool { return e.taken && target == usernet.ErrPortTaken }

// recheck has keep look at the ports soon.
func (l *link) recheck() {
	select {
	case l.checks <- struct{}{}:
	default:
	}
}

// keep publishes what is wanted and not had: everything first, and later what the host has refused.
func (c *Client) keep(ctx context.Context, l *link) {
	tick := time.NewTicker(c.retry)
	defer tick.Stop()
	for {
		for _, w := range c.all() {
			was := w.Err()
			err := w.ask(l)
			if ctx.Err() != nil {
				return
			}
			if err != nil && (was == nil || was.Error() != err.Error()) {
				c.cfg.Log.Error("port is not published on the host", "port", key{w.wish.Proto, w.wish.Addr, w.HostPort()}.String(), "err", err)
			}
		}
		select {
		case <-tick.C:
		case <-l.checks:
		case <-ctx.Done():
			return
		}
	}
}

// standBy keeps one stream standing while anything is published, until the session ends. It is the host that closes those that stand when
// nothing is published any more: of a stream that the guest had closed, the host might not know yet when it has a client for the
// next port.
func (c *Client) standBy(ctx context.Context, l *link) {
	wait := shortestWait
	for ctx.Err() == nil {
		c.mu.Lock()
		want, wanted := c.want, c.wanted
		c.mu.Unlock()
		select {
		case <-wanted:
		case <-ctx.Done():
			return
		}
		if want.Err() != nil {
			continue
		}
		err := c.stream(ctx, l)
		if err == nil || ctx.Err() != nil || want.Err() != nil {
			wait = shortestWait
			continue
		}
		c.cfg.Log.Debug("no stream", "gateway", c.cfg.Name, "err", err)
		t := time.NewTimer(wait)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
		}
		wait = min(2*wait, longestWait)
	}
}

// stream makes a stream and waits until the host uses it.
func (c *Client) stream(ctx context.Context, l *link) error {
	short, cancel := context.WithTimeout(ctx, dialWithin)
	defer cancel()
	conn, err := c.cfg.Dial(short)
	if err != nil {
		return err
	}
	answer, err := upgrade(short, conn, StreamPath, secretHeader, l.secret)
	if err != nil {
		return err
	}
	cut := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	h, err := proxy.Read(conn)
	if !cut() && err == nil {
		err = ctx.Err()
	}
	if err != nil {
		conn.Close()
		return err
	}
	w := c.find(h)
	if w == nil {
		c.settle() // the host's answer may have been overtaken
		w = c.find(h)
	}
	if w == nil {
		conn.Close()
		c.cfg.Log.Debug("a connection for a port that is not published", "port", h.Target)
		return nil
	}
	if answer.Get(chunksHeader) != "" && !h.Datagram {
		c := newChunked(conn, nil, conn)
		c.patient = true
		conn = c
	}
	w.handle(h, conn)
	return nil
}
