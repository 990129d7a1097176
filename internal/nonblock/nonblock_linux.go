// Package nonblock is the system calls that make connections, and move bytes and packets, by descriptors that do not block, without
// the runtime's scheduler being told.
//
// The runtime takes a system call that lasts for more than some 20 µs for one that waits: it hands the goroutine's processor to another
// thread, which has to be woken, and as long as it finds such calls it looks for more every 20 µs. To copy 64 KiB takes as long.
// In a gateway that carried one stream, the thread that looks (sysmon) alone used a tenth of what the process did. In one that
// carried a datagram at a time it was as much: where nothing else goes on that thread sleeps, and the next call wakes it.
//
// A call here keeps its processor, also from the garbage collector, until it has copied: some tens of µs, with a receiver in the same
// kernel some more. So the descriptor must not be a file, nor block.
package nonblock

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// Read is read(2). It returns 0 at the end, and unix.EAGAIN where it would have to wait.
func Read(fd int, b []byte) (int, error) {
	return call(unix.SYS_READ, fd, unsafe.Pointer(unsafe.SliceData(b)), len(b))
}

// Write is write(2). It may write less than all of b.
func Write(fd int, b []byte) (int, error) {
	return call(unix.SYS_WRITE, fd, unsafe.Pointer(unsafe.SliceData(b)), len(b))
}

// Readv is readv(2).
func Readv(fd int, iovs []unix.Iovec) (int, error) {
	return call(unix.SYS_READV, fd, unsafe.Pointer(unsafe.SliceData(iovs)), len(iovs))
}

// Writev is writev(2). It may write less than all of iovs, of which there are to be no more than 1024.
func Writev(fd int, iovs []unix.Iovec) (int, error) {
	return call(unix.SYS_WRITEV, fd, unsafe.Pointer(unsafe.SliceData(iovs)), len(iovs))
}

// Send is send(2), with MSG_DONTWAIT, of a datagram, which may be of no bytes.
func Send(fd int, b []byte) error {
	_, err := call6(unix.SYS_SENDTO, fd, unsafe.Pointer(unsafe.SliceData(b)), len(b), unix.MSG_DONTWAIT)
	return err
}

// Sendmsg is sendmsg(2), with MSG_DONTWAIT.
func Sendmsg(fd int, m *unix.Msghdr) error {
	_, err := call6(unix.SYS_SENDMSG, fd, unsafe.Pointer(m), unix.MSG_DONTWAIT, 0)
	return err
}

// Message is struct mmsghdr of recvmmsg(2) and sendmmsg(2).
type Message struct {
	Hdr unix.Msghdr
	Len uint32
}

// Recvmmsg is recvmmsg(2), with MSG_DONTWAIT. It returns how many messages have been received.
func Recvmmsg(fd int, messages []Message) (int, error) {
	return call6(unix.SYS_RECVMMSG, fd, unsafe.Pointer(unsafe.SliceData(messages)), len(messages), unix.MSG_DONTWAIT)
}

// Sendmmsg is sendmmsg(2), with MSG_DONTWAIT. It returns how many of messages have been sent.
func Sendmmsg(fd int, messages []Message) (int, error) {
	return call6(unix.SYS_SENDMMSG, fd, unsafe.Pointer(unsafe.SliceData(messages)), len(messages), unix.MSG_DONTWAIT)
}

// EpollReady is epoll_wait(2) with a timeout of zero.
func EpollReady(epoll int, events []unix.EpollEvent) (int, error) {
	return call6(unix.SYS_EPOLL_PWAIT, epoll, unsafe.Pointer(unsafe.SliceData(events)), len(events), 0)
}

// Iovec is what of b goes into a vector.
func Iovec(b []byte) unix.Iovec {
	v := unix.Iovec{Base: unsafe.SliceData(b)}
	v.SetLen(len(b))
	return v
}

// Skip cuts the first n bytes off a vector, which it changes.
func Skip(iovs []unix.Iovec, n int) []unix.Iovec {
	for len(iovs) > 0 && n >= int(iovs[0].Len) {
		n -= int(iovs[0].Len)
		iovs = iovs[1:]
	}
	if n > 0 {
		v := &iovs[0]
		v.Base = (*byte)(unsafe.Add(unsafe.Pointer(v.Base), n))
		v.SetLen(int(v.Len) - n)
	}
	return iovs
}

func call(trap uintptr, fd int, memory unsafe.Pointer, n int) (int, error) {
	return call6(trap, fd, memory, n, 0)
}

// call6 is call with a fourth argument; the last two are zero.
func call6(trap uintptr, fd int, memory unsafe.Pointer, n, m int) (int, error) {
	for {
		done, _, errno := unix.RawSyscall6(trap, uintptr(fd), uintptr(memory), uintptr(n), uintptr(m), 0, 0)
		switch errno {
		case 0:
			return int(done), nil
		case unix.EINTR:
		default:
			return 0, errno
		}
	}
}
