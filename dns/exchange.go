package dns

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	miekg "github.com/miekg/dns"
)

var (
	errTruncated = errors.New("truncated answer")
	errWrong     = errors.New("answer to another question")
)

// datagrams has the buffers that answers are read into.
var datagrams = sync.Pool{New: func() any { return new([miekg.MaxMsgSize]byte) }}

// ask puts the question to one server. Where the answer by UDP is truncated, it asks for the whole by TCP.
func (f *forwarder) ask(ctx context.Context, a attempt, q *query) ([]byte, error) {
	msg, err := f.askVia(ctx, a, q)
	if err != nil {
		return nil, fmt.Errorf("ask %v by %s: %w", a.server, a.via.network(), err)
	}
	if a.via == overUDP && flags(msg)&flagTC != 0 {
		a.via = overTCP
		if whole, err := f.askVia(ctx, a, q); err == nil {
			return whole, nil
		}
		return q.appendTruncated(nil), nil
	}
	return msg, nil
}

// askVia makes one connection for one question: its source port, which the kernel chooses, and its ID are what
// somebody off the path has to guess (RFC 5452).
func (f *forwarder) askVia(ctx context.Context, a attempt, q *query) ([]byte, error) {
	conn, err := f.dial(ctx, a.via.network(), a.server.String())
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })()

	ask := make([]byte, 2, 2+len(q.msg))
	binary.BigEndian.PutUint16(ask, uint16(len(q.msg)))
	ask = append(ask, q.msg...)
	rand.Read(ask[2:4])
	if a.via == overTCP {
		if _, err := conn.Write(ask); err != nil {
			return nil, err
		}
		return readStream(conn, ask[2:])
	}
	ask = ask[2:]
	if q.opt != 0 {
		put16(ask, q.opt, udpSize)
	}
	if _, err := conn.Write(ask); err != nil {
		return nil, err
	}
	return readDatagram(conn, ask)
}

// readDatagram reads until the answer to ask has come.
func readDatagram(conn net.Conn, ask []byte) ([]byte, error) {
	buf := datagrams.Get().(*[miekg.MaxMsgSize]byte)
	defer datagrams.Put(buf)
	for {
		n, err := conn.Read(buf[:])
		if err != nil {
			return nil, err
		}
		// What is not the answer may be somebody's guess at it. The right one may still come.
		if msg, err := check(buf[:n], ask); err == nil {
			return bytes.Clone(msg), nil
		}
	}
}

func readStream(conn io.Reader, ask []byte) ([]byte, error) {
	var size [2]byte
	if _, err := io.ReadFull(conn, size[:]); err != nil {
		return nil, err
	}
	msg := make([]byte, binary.BigEndian.Uint16(size[:]))
	if _, err := io.ReadFull(conn, msg); err != nil {
		return nil, err
	}
	return check(msg, ask)
}

// check tells whether msg is an answer to ask that can be passed on, and returns it without what may follow it.
func check(msg, ask []byte) ([]byte, error) {
	if len(msg) < headerLen || !bytes.Equal(msg[:2], ask[:2]) || flags(msg)&(flagQR|opcodeMask) != flagQR {
		return nil, errWrong
	}
	asked, err := questionEnd(ask)
	if err != nil {
		return nil, err
	}
	question := ask[headerLen:asked]
	if rcode := rcodeOf(msg); count(msg, 0) == 0 && rcode != miekg.RcodeSuccess && rcode != miekg.RcodeNameError {
		// A server that could not make anything of the question does not repeat it.
		bare := append(bytes.Clone(msg[:headerLen]), question...)
		setCount(bare, 0, 1)
		return clearCounts(bare, inAnswer, inAuthority, inAdditional), nil
	}
	if count(msg, 0) != 1 || len(msg) < asked || !sameQuestion(msg[headerLen:asked], question) {
		return nil, errWrong
	}
	if flags(msg)&flagTC != 0 { // it may end anywhere, and is not used
		return msg, nil
	}
	end, err := walk(msg, asked, func(record) {})
	if err != nil {
		return nil, err
	}
	return msg[:end], nil
}

// sameQuestion compares two questions of the same length, whatever the case of their names.
func sameQuestion(a, b []byte) bool {
	name := len(b) - 4
	return bytes.Equal(a[name:], b[name:]) && equalFoldASCII(a[:name], b[:name])
}

func equalFoldASCII(a, b []byte) bool {
	for i := range a {
		if lower(a[i]) != lower(b[i]) {
			return false
		}
	}
	return true
}

// lower folds a byte of a name in wire format. The length bytes of labels are below 64 and stay as they are.
func lower(c byte) byte {
	if 'A' <= c && c <= 'Z' {
		c += 'a' - 'A'
	}
	return c
}
