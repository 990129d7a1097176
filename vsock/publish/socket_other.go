//go:build !linux

package publish

import "io"

// inlet is the reading side of a connection.
type inlet struct{ io.Reader }

func newInlet(from io.Reader) *inlet { return &inlet{from} }

// read reads into b, or into room if b is empty. It returns how many bytes that were. Without wait there are none: the system
// does not tell what it would wait for.
func (in *inlet) read(b, room []byte, wait bool) (int, error) {
	if !wait {
		return 0, nil
	}
	if len(b) == 0 {
		b = room
	}
	return in.Read(b)
}

// await does not wait: the system does not tell.
func (*inlet) await() error { return nil }

// outlet is the writing side of a connection.
type outlet struct{ io.Writer }

func newOutlet(to io.Writer) *outlet { return &outlet{to} }

// write writes all of b.
func (out *outlet) write(b []byte) error {
	_, err := out.Write(b)
	return err
}

// sendSpliced is for systems that have it.
func sendSpliced(sink, source) (bool, error) { return false, nil }
