// Package nonblock is read(2), write(2) and their vector forms for descriptors that do not block, without the runtime's scheduler
// being told. It is for those who move tens of KiB by each call.
//
// The runtime takes a system call that lasts for more than some 20 µs for one that waits: it hands the goroutine's processor to another
// thread, which has to be woken, and as long as it finds such calls it looks for more every 20 µs. To copy 64 KiB takes as long.
// In a gateway that carried one stream, the thread that looks (sysmon) alone used a tenth of what the process did.
//
// A call here keeps its processor, also from the garbage collector, until it has copied: some tens of µs, with TCP at the other end some
// more. So the descriptor must not be a file, nor block.
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

// Iovec is what of b goes into a vector. b must not be empty.
func Iovec(b []byte) unix.Iovec {
	v := unix.Iovec{Base: &b[0]}
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
	for {
		done, _, errno := unix.RawSyscall(trap, uintptr(fd), uintptr(memory), uintptr(n))
		switch errno {
		case 0:
			return int(done), nil
		case unix.EINTR:
		default:
			return 0, errno
		}
	}
}
