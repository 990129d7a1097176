//go:build !linux

package resolvconf

import (
	"context"
	"time"
)

// pollEvery is how often the file is read where there is no telling when it changes.
const pollEvery = 5 * time.Second

type watcher struct{}

func newWatcher() (*watcher, error) { return nil, nil }

func (*watcher) Close() {}

func (*watcher) watch([]place) error { return nil }

func (*watcher) wait(ctx context.Context, most time.Duration) { sleep(ctx, min(most, pollEvery)) }
