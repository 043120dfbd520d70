! evaluate FLOW FOLDER f|d ROWS: every procedure of fastmaf.f90 on the arrays in FOLDER, raw numbers; what comes out goes there too.
! Compiled once for each KIND, real32 or real64; the third argument is not read.
program evaluate
    use, intrinsic :: iso_fortran_env, only: int64, KIND
    use fastmaf
    implicit none
    integer, parameter :: draws = 5, groups = 3
    type(flow_model) :: model, opened
    type(flow_evaluator) :: flow
    character(1000) :: argument, folder
    real(KIND), allocatable :: x(:, :), wide(:, :), context(:, :), value(:), other(:), d_x(:, :), d_context(:, :), samples(:, :)
    real(KIND), allocatable :: shared(:), d_shared(:), of_groups(:, :, :), probabilities(:, :, :), crossed(:, :), one_each(:, :)
    integer :: rows, d, c, most, members, i, status
    character(200) :: text

    call get_command_argument(4, argument)
    read (argument, *) rows
    call get_command_argument(2, folder)
    call get_command_argument(1, argument)
    call opened%open(argument)
    model = opened
    call opened%close()
    call flow%create(model)
    d = model%features()
    c = model%context_features()
    most = model%most_values()
    members = model%members()
    allocate (x(d, rows), context(c, rows), value(rows), other(rows), d_x(d, rows), d_context(c, rows), samples(d, draws))
    allocate (of_groups(d, draws, groups), probabilities(most, d, rows), crossed(rows, groups), one_each(d, groups), d_shared(c))
    call load('x', x)
    allocate (wide(2 * d, 2 * rows))
    wide = -1
    wide(1:2 * d:2, 2:2 * rows:2) = x

    if (c > 0) then
        call load('context', context)
        shared = context(:, 1)
        call flow%log_prob(x, value, context)
        call flow%log_prob(x, other, shared)
    else
        call flow%log_prob(x, value)
        call flow%log_prob(wide(1:2 * d:2, 2:2 * rows:2), other)
    end if
    call save1('log_prob', value)
    call save1('log_prob_shared', other)

    if (members > 0) then
        if (c > 0) then
            call flow%to_noise(x, d_x, context, stat=status, errmsg=text)
        else
            call flow%to_noise(x, d_x, stat=status, errmsg=text)
        end if
        call require(status == 4, text)
    end if
    if (most > 0 .and. members > 0) then
        call flow%sample(samples, -1_int64, 7_int64, 2, value(:draws))
    else if (most > 0) then
        if (most == 1) then
            call flow%conditional_probs(x, d_x)
            probabilities(1, :, :) = d_x
        end if
        call flow%conditional_probs(x, probabilities)
        if (most == 1) call require(all(probabilities(1, :, :) == d_x), 'probabilities with and without their first axis')
        call save1('probabilities', reshape(probabilities, [size(probabilities)]))
        call flow%sample(samples, -1_int64, 7_int64, 2, value(:draws))
    else if (c > 0) then
        call flow%log_prob_and_grad(x, value, d_x, context, d_context)
        call save2('d_x', d_x)
        call save2('d_context', d_context)
        call save1('value', value)
        call flow%log_prob_and_grad(x, value, d_x, shared, d_shared)
        call save1('d_context_shared', d_shared)
        if (members == 0) then
            call flow%to_noise(x, d_x, context)
            call save2('noise', d_x)
            call flow%from_noise(x, d_x, context)
            call save2('from_noise', d_x)
        end if
        call flow%sample(samples, shared, -1_int64, 7_int64, 2, value(:draws))
        call flow%sample(of_groups, context(:, :groups), 1_int64)
        call save1('samples_of_groups', reshape(of_groups, [size(of_groups)]))
        call flow%sample(one_each, context(:, :groups), 1_int64)
        call require(all(one_each == of_groups(:, 1, :)), 'one sample for each context')
        of_groups(:, 2:2, :) = 0
        call flow%sample(of_groups(:, 2:2, :), context(:, :groups), 1_int64, log_prob=crossed(1:1, :))
        call require(all(one_each == of_groups(:, 2, :)), 'groups of one sample')
        call flow%sample(one_each, context(:, :groups), 1_int64, log_prob=d_x(1, :groups))
        call require(all(crossed(1, :) == d_x(1, :groups)), 'log-densities of groups of one sample')
        do i = 1, groups
            call flow%log_prob(x, crossed(:, i), context(:, i))
        end do
        call save2('log_prob_of_groups', crossed)
    else
        wide = -1
        call flow%log_prob_and_grad(x, value, wide(2:2 * d:2, 1:2 * rows:2))
        call save2('d_x', wide(2:2 * d:2, 1:2 * rows:2))
        call require(all(wide(1:2 * d:2, :) == -1) .and. all(wide(:, 2:2 * rows:2) == -1), 'nothing beside a section is written')
        call save1('value', value)
        call save2('d_context', d_context)
        call save1('d_context_shared', d_shared)
        if (members == 0) then
            call flow%to_noise(x, d_x)
            call save2('noise', d_x)
            call flow%from_noise(x, d_x)
            call save2('from_noise', d_x)
        end if
        call flow%sample(samples(:, draws:1:-1), -1_int64, 7_int64, 2, value(draws:1:-1))
        samples = samples(:, draws:1:-1)
        value(:draws) = value(draws:1:-1)
    end if
    call save2('samples', samples)
    call save1('density', value(:draws))

contains

    subroutine load(name, array)
        character(*), intent(in) :: name
        real(KIND), intent(out) :: array(:, :)
        integer :: unit
        open (newunit=unit, file=trim(folder) // '/' // name, access='stream', form='unformatted', status='old', action='read')
        read (unit) array
        close (unit)
    end subroutine

    subroutine save1(name, array)
        character(*), intent(in) :: name
        real(KIND), intent(in) :: array(:)
        integer :: unit
        open (newunit=unit, file=trim(folder) // '/' // name, access='stream', form='unformatted', status='replace', action='write')
        write (unit) array
        close (unit)
    end subroutine

    subroutine save2(name, array)
        character(*), intent(in) :: name
        real(KIND), intent(in) :: array(:, :)
        call save1(name, reshape(array, [size(array)]))
    end subroutine

    subroutine require(so, what)
        logical, intent(in) :: so
        character(*), intent(in) :: what
        if (so) return
        print '(a)', what
        error stop 1
    end subroutine

end program
