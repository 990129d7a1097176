package publish

import (
	"bufio"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/usernet/usernet"
)

// The operations of a session.
const (
	opPublish   = "publish"
	opUnpublish = "unpublish"
	opPing      = "ping"
)

// message is one line of a session.
type message struct {
	Op    string        `json:"op,omitempty"` // "": an answer
	ID    uint64        `json:"id,omitempty"`
	Proto usernet.Proto `json:"proto,omitempty"`
	Addr  netip.Addr    `json:"addr,omitzero"`
	Port  uint16        `json:"port,omitempty"`
	End   uint16        `json:"end,omitempty"`
	Error string        `json:"error,omitempty"`
	Taken bool          `json:"taken,omitempty"`
}

// lines is the connection of a session behind its request.
type lines struct {
	conn net.Conn
	in   *bufio.Reader

	mu  sync.Mutex // one line at a time
	out []byte
}

func newLines(conn net.Conn, r io.Reader) *lines {
	return &lines{conn: conn, in: bufio.NewReaderSize(r, maxLine)}
}

// read returns the next line. An error ends the session.
func (l *lines) read() (message, error) {
	if err := l.conn.SetReadDeadline(time.Now().Add(silence)); err != nil {
		return message{}, err
	}
	line, err := l.in.ReadSlice('\n')
	if errors.Is(err, bufio.ErrBufferFull) {
		return message{}, fmt.Errorf("a line is longer than %d bytes", maxLine)
	}
	if err != nil {
		return message{}, err
	}
	return decode(line)
}

func decode(line []byte) (m message, err error) {
	if err := json.Unmarshal(line, &m); err != nil {
		return message{}, fmt.Errorf("a line is no message: %w", err)
	}
	return m, nil
}

// write sends a line. An error ends the session: part of the line may have been sent.
func (l *lines) write(m message) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	text, err := json.Marshal(m)
	if err != nil {
		return err
	}
	l.out = append(append(l.out[:0], text...), '\n')
	if err := l.conn.SetWriteDeadline(time.Now().Add(silence)); err != nil {
		return err
	}
	_, err = l.conn.Write(l.out)
	return err
}

// ping tells the other side from time to time that we are there, until ctx is done. Who does not take it is gone.
func (l *lines) ping(ctx context.Context) {
	tick := time.NewTicker(pingEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			if err := l.write(message{Op: opPing}); err != nil {
				l.conn.Close()
				return
			}
		case <-ctx.Done():
			return
		}
	}
}

// key is a port of the host, as the guest names it.
type key struct {
	proto usernet.Proto
	addr  netip.Addr // zero: all
	port  uint16
}

func (k key) String() string {
	if !k.addr.IsValid() {
		return fmt.Sprintf("%d/%s", k.port, k.proto)
	}
	return fmt.Sprintf("%s/%s", netip.AddrPortFrom(k.addr, k.port), k.proto)
}

// newNumber is 128 random bits as text.
func newNumber() string {
	var b [16]byte
	rand.Read(b[:])
	return hex.EncodeToString(b[:])
}

// isNumber tells whether s is written as newNumber does it.
func isNumber(s string) bool {
	b, err := hex.DecodeString(s)
	return err == nil && len(b) == 16
}
